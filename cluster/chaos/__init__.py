"""Chaos: the same jobs twice, undisturbed and while parts of the cluster are killed, and every answer compared.

    jobs ──────> crowd ──reads──> transcripts ──┐
    schedule ──> killer ──kills─> cluster       ├──> verdict, recovery ──> report
                 settling ──looks for leaks─────┘

`jobs`, `schedule`, `verdict`, `recovery` and `report` are pure; the rest talks to a local cluster and its processes.
"""
