"""The page that shows plans: an image, a question and a budget on one side, what is kept on the other."""
