"""The embedded model's own pretraining: tokenizer, synthetic episodes, network, objectives, run, card.

``python -m copa_harness.pretrain`` makes, from nothing and from one seed, the files shipped in
``copa_harness/lm/embedded``. This room knows nothing of the tasks in ``suites/`` except in ``evaluate``, which
measures a finished model on them once for the model card.
"""
