"""What a person looks at: model card, report, viewer, samples, comparisons. Nothing that training needs."""
