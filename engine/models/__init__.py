"""Model families: bodies that end at the final hidden state, and the heads that go on from there."""
