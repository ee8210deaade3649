"""Training: what is drawn, the loop, and what makes a run survive."""
