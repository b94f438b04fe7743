"""Operations on a vocabulary head: hidden states and a weight in, no stored logits."""
