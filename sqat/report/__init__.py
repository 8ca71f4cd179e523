"""`sqat report`: what a run made, how good and how fast it is, and how to make it again, as one HTML page."""
