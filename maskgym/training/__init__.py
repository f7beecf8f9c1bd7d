"""The trainings: of the controller, by rewards or by relaxation, and of the VLM that it decides for."""
