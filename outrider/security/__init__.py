"""Who may talk to whom: TLS on every link, identities of tiers, keys of callers.

Shared by the three services and the command line. docs/security.md says what it protects from.
Reading order: settings, files, pem, serving, channel, guarding, identity, keys.
"""
