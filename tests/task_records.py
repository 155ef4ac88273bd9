"""One record of each task, in the shape of its public set."""

FOUR = {"text": ["a pan", "a cup", "a sieve", "a lid"], "label": ["A", "B", "C", "D"]}

RECORDS = {
    "boolq": {"question": "is rain wet", "passage": "Rain is water\nthat falls.", "answer": True},
    "piqa": {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Turn the floor.", "label": 0},
    "siqa": {
        "context": "Kim gave Lee a gift.",
        "question": "How would Lee feel?",
        "answerA": "angry",
        "answerB": "pleased",
        "answerC": "asleep",
        "label": "2",
    },
    "hellaswag": {
        "activity_label": "Baking",
        "ctx": "A man mixes dough. He",
        "endings": ["sings to it.", "bakes it.", "reads it.", "sells the sea."],
        "label": "1",
    },
    "winogrande": {
        "sentence": "The cup was not in the bag because the _ was too small.",
        "option1": "cup",
        "option2": "bag",
        "answer": "2",
    },
    "arc_easy": {"question": "What drains pasta?", "choices": FOUR, "answerKey": "C"},
    "arc_challenge": {
        "question": "What boils?",
        "choices": {"text": ["ice", "rock", "water"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    },
    "openbookqa": {"question_stem": "You drink from", "choices": FOUR, "answerKey": "B"},
    "gsm8k": {"question": "How many legs have two spiders?", "answer": "2 times 8 is <<2*8=16>>16.\n#### 16"},
    "metamath": {"query": "What is half of 9?", "response": "Half of 9 is 4.5.\nThe answer is: 4.5", "type": "MATH_SV"},
}
