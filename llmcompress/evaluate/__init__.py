"""What a compressed checkpoint lost: the same items through both models, compared pair by pair, against a budget."""
