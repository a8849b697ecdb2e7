"""Orchestrator: runs generations and sessions, and streams tokens to clients.

Uses draft and target services through their gRPC contracts only.
"""
