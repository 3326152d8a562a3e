"""The steps of a run, from its opening to the next plan; ``prune2deploy.loop`` joins them."""
