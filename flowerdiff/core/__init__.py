"Settings, profiles, fingerprints and the workspace."
