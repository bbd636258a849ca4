"""Views of a run: model card, report, viewer, samples, comparisons. Training needs none of them."""
