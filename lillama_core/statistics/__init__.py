"""What is measured on the dense model: second moments, sensitivities, decompositions."""
