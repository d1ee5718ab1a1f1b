"""Twenty varied prompts: questions, code, lists, letters, other languages, repetition, one token and long ones."""

STORY = (
    "The lighthouse keeper climbed the stairs every evening at the same hour, lit the lamp, and wrote one line in the log. "
    "On the third of October the line was different. "
)
PROMPTS = [
    "What is gravity?",
    "The capital of France is",
    "def quicksort(items):\n    ",
    "Once upon a time",
    "1, 1, 2, 3, 5, 8, 13,",
    "Q: How do vaccines work?\nA:",
    "Dear hiring manager,\n\n",
    "La Révolution française a commencé en",
    "List five fruits:\n1.",
    "The mitochondria is",
    "SELECT name, age FROM users WHERE",
    "To be, or not to be, that is",
    "abc abc abc abc abc abc abc abc",
    "Ingredients: flour, sugar, eggs.\nInstructions:",
    "In quantum mechanics, the wave function",
    "<html>\n<head>\n<title>",
    "I",
    "Translate to German: Good morning, my friend.",
    STORY * 3,
    "Summary of the following text: " + STORY * 8 + "\nSummary:",
]
