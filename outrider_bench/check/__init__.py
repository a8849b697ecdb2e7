"""Is a pair of models worth it here? What `outrider check` finds out, step by step.

Reading order: inspection (files), prompts, acceptance (teacher-forced, a child process), replay
(rounds from it), prediction (speed-up), loops (real services), verdict, report.
"""
