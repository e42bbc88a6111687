"From image files to training batches."
