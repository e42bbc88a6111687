"The ten stages. Each module's `run` is also the last cell of its notebook."
