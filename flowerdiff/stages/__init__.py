"The ten stages; each `run` is also the last cell of its notebook."
