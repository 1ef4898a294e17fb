"""The search benchmark: cells (task x seed x budget x method), how they are run, and what is made of them."""
