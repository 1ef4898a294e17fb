"""DSPy's optimizers by name, under the same budget and meter as everything else.

`registry` runs one; `builders` constructs it from a job (`contract`) and the user's arguments (`kwargs`); `student`
prepares the programs it is given; `finetune` and `knn` mend what those need.
"""
