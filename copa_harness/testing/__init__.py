"""For tests of programs, engines and this package.

`tiny_models` writes local models of a few hundred kilobytes, and `engine_contract` has the tests every engine passes.
The scripted model, the other public double, is `copa_harness.ScriptedLM`.
"""
