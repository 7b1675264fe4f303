"""Instance discrimination: learn image embeddings by telling every image apart from every other one."""
