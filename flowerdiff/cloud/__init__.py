"Training jobs on SageMaker."
