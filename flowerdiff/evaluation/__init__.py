"Metrics, the report and the model card."
