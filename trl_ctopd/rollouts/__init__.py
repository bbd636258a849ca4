"""How the text of an optimizer step comes about: prompts, the student's writing, pairing with the teacher's reading."""
