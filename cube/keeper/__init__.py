"""The process that keeps pods: it starts their machines, supervises them, and answers for them.

One keeper per state directory owns STATE/pods and the record in it. It must never be needed for a
pod to go on living: machines are no children that die with it, and the next keeper adopts them.
It holds policy (order, restarts, probes, grace); the guest's agent has the mechanisms only.
"""
