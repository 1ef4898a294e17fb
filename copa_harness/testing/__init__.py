"""For tests of programs, engines and this package: tiny local models on disk.

The scripted model, the other public double, is `copa_harness.ScriptedLM`.
"""
