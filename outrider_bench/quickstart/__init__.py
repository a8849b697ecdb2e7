"""Training of the quickstart pair from scratch: corpus, target, distilled draft, evaluation.

Start reading at `train`. The trained pair is in `outrider.quickstart_pair`.
"""
