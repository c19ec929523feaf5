"""What the runs of a task can say, a file a task. Importing one loads no network."""
