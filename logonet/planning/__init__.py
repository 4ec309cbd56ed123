"""What a run will read, store, hold in memory, take and cost, and what will not fit, before it starts.

    request    from the command's flags to scans, a cluster and constants
    planner    the plan: everything below put together, and the sentences about what will not fit
    sizes      bytes of every file and stage of a pretraining, from shapes
    labelled   the same of a finetuning: its split, its cases, and the windows that it validates on
    memory     memory and arithmetic of a micro-batch, counted on tensors without data
    hardware   machines, clusters and the price table
    constants  measured rates; `measuring` measures them on the cluster at hand
    speed      seconds of a step and of a stage
    table      the plan as tables

docs/planning.md explains the model.
"""
