"""Training of the quickstart pair from nothing: corpus, target, distilled draft, evaluation.

`train` is the way through it. The trained pair is in `outrider.quickstart_pair`.
"""
