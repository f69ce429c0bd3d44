"""Who answers: an engine by tokens or by messages, the reference solution, or nobody."""
