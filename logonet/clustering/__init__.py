"""K-means clusterers, their pseudo-labels and how good these are."""
