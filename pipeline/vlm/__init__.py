"""The vision-language model: rows with patch features in, a trained model, its loss and its answers out.

batches      which rows go together, and their tensors          model        projector, splice, language model, checkpoint
evaluation   what a model has learnt                            training     one loop for both training stages
"""
