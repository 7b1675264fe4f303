"""Found instead of Ray in quick tests and in what they start."""

raise ImportError("a quick test imports Ray: mark the test with pytest.mark.ray")
