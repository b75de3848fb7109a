"""The APIs that the server speaks. Each file translates one of them into a Question, and the answer's items back."""
