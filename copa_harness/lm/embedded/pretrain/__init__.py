"""The embedded model's own pretraining: tokenizer, synthetic episodes, network, objectives, run, card.

``python -m copa_harness.lm.embedded.pretrain`` makes, from nothing and from one seed, the files shipped in
``copa_harness/lm/embedded``. Read in the order of the making: ``recipe`` (what is done), ``worlds``, ``template`` and
``episodes`` (what is learned from), ``tokenizer`` and ``batches`` (as tokens), ``network`` and ``objectives``,
``train``; then ``measure`` and ``development_tasks`` (what it can do) and ``figures`` (the tables of the model card).
Needs torch 2.9 or later, for its Muon.
"""
