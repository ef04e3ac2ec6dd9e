"""Training: chats in, adapter out. Knows messages and weights; knows no environment, agent or hint."""
