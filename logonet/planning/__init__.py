"""What a pretraining will read, keep, hold in memory, take and cost, and what will not fit: before it is launched.

    sizes      bytes of every file and stage, from shapes
    memory     the memory and the arithmetic of a micro-batch, on tensors without numbers
    hardware   machines, clusters and a price table
    constants  what shapes do not tell; `measuring` measures it where the run will be
    speed      the model of steps and stages
    whole      all of it together, and the sentences about what will not fit
    table      for people

docs/planning.md writes the model down, with every symbol and where its number comes from.
"""
