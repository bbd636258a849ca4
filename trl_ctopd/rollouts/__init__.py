"""The text of an optimizer step: prompts, the student's completions, and their pairing with the teacher's tokens."""
