import mlx.core as mx
import mlx_lm


def test_the_folder_that_vllm_reads_is_the_demo_model(model_folder, demo):
    model, tokenizer = mlx_lm.load(str(model_folder))[:2]
    text = "Why do people drink tea?"
    prompt = demo[1].encode(text)
    assert tokenizer.encode(text) == prompt
    assert tokenizer.chat_template == demo[1].chat_template
    assert mx.array_equal(model(mx.array([prompt])), demo[0](mx.array([prompt])))
