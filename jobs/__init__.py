"""What a job is: states, requests, the store in Redis, and the settings that every role shares."""
