"""What is asked of a network: head, loss, metrics, data. One file a task."""
