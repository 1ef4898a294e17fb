"""The embedded model's own pretraining: tokenizer, synthetic episodes, network, objectives, run, card.

``python -m copa_harness.lm.embedded.pretrain`` makes, from nothing and from one seed, the files shipped in
``copa_harness/lm/embedded``.
"""
