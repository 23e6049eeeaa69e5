"""What a run would need on a cluster that is not there: plan, memory, predicted time of a step. Nothing is allocated.

The plan is the one that training makes (make_planner, constraints); the times are TorchRec's model of the hardware and have
not been compared with any (docs/scaling.md says how to read them).

hardware → world (a plan, or why there is none) → search (the smallest that fits, tables in host memory), measured → report
"""
