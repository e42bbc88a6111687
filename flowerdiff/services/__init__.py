"Hardware, processes, stores, downloads and experiment trackers."
