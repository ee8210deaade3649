"""`tworeel bench`: steps of a model of random weights, timed on the user's own devices."""
