"""Real servers on loopback for demo, journeys and benchmarks: a registry, an S3 store, a proxy.

Must never outlive who started them: every process dies with its parent, and `Stage` stops them all.
State: one scratch folder per `Stage`, removed at its end.
"""
