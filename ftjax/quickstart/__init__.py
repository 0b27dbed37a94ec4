"""The embedded example: a helpdesk's own routing of messages, as data and as a task."""
