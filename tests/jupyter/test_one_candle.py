"""Every cell sees the same candle. Linked statically, each cell would restart the counter of
tensor ids; a Var of one cell and a tensor of the next would share an id, and the gradient of one
would be added to the other's: dw came out as [13, 23, 33] instead of [3, 3, 3]."""


def test_gradients_across_cells_are_exact(cells):
    cells.run("let w = Var::new(&[10f32, 20., 30.], &Device::Cpu)?;")
    cells.run(
        "let x = Tensor::new(&[1f32, 1., 1.], &Device::Cpu)?;\n"
        "let b = (&x * 3.)?;\n"
        "let loss = (w.as_tensor() * &b)?.sum_all()?;\n"
        "let dw = loss.backward()?.get(&w).map(|g| g.to_vec1::<f32>()).transpose()?;"
    )
    assert cells.run('println!("{dw:?}");') == "Some([3.0, 3.0, 3.0])"


def test_tensor_ids_go_on_from_cell_to_cell(cells):
    cells.run("let first = Tensor::zeros(1, DType::F32, &Device::Cpu)?;")
    cells.run("let second = Tensor::zeros(1, DType::F32, &Device::Cpu)?;")
    assert cells.run('println!("{}", first.id() == second.id());') == "false"
