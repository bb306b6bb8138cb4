"""`contrec tune`: settings of the model or of a baseline, tried one after another on validation users. Read trials.py.

    space.py    what may be chosen, from configs/tuning/NAME.yaml
    proposal.py what to try next: a function of seed and what was tried
    trials.py   the loop, its records, one trial's run
    table.py    trials.md, best.yaml and the terminal
"""
